"""What is fitted on tuning seeds: static pairs, load tables, prices, anchors."""
