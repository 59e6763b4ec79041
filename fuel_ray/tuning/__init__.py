"""What is fitted on tuning seeds: static pairs, simple rules, prices, anchors."""
