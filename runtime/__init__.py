import runtime.signals  # first of all: who stops a script while it imports torch gets a line, no traceback
