"""The service under all that callers and fal may do to it, for as long as one likes.

``python -m soak --seconds=3600`` starts the command and a stand-in for fal, and at its end tells what was wrong, what
is left of the calls, and whether memory grew. The callers and the HTTPS server are those of the tests. Nothing here is
part of what is installed.
"""
