"""Files: reading and writing them so that an interruption, another process or a full disk loses nothing."""
