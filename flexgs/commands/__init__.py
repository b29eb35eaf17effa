"""The commands of `flexgs`: a dataclass each, whose fields are its flags, and which is called to run it."""
