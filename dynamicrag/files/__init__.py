"""Reading and writing files without losing data to an interruption, another process or a full disk."""
