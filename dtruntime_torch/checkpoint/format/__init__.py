"""Behind `manifest`: the records of which a checkpoint's JSON files consist, their fields, and what must hold."""
