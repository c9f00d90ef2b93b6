"""What each op computes and how: a folder per op, and what they share. Start at a folder's api.py."""
