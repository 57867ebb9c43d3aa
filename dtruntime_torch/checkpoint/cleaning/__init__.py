"""What is kept and what goes, and the order in which it goes."""
