"""Whatever decides: static and learned policies, one file per published rule."""
