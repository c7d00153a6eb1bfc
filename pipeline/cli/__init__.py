"""What people type: the commands, and what each does with its words."""
