"""Everything that touches a real server or a real GPU."""
