"""How much of everything the page takes at once: the only place where these numbers stand."""

__all__ = [
    "BATCH", "CONNECTIONS", "DECODING", "GRACE", "HELD", "IN_QUEUE", "LARGEST_CALL", "LARGEST_PHOTO", "LINES_A_MINUTE",
    "PATIENCE", "QUICK_AT_ONCE", "REMEMBERED", "RENDERING", "SECONDS_OF_A_BODY", "SECONDS_OF_A_VISIT", "SLOW_AT_ONCE",
    "SLOW_BATCH", "SLOW_WAITING", "TICK", "UNHEARD", "VALUES", "WAITING_AT_ONCE",
]  # fmt: skip

# Requests
LARGEST_PHOTO = 20_000_000  # bytes of a photo's file
LARGEST_CALL = LARGEST_PHOTO * 4 // 3 + 1_000_000  # bytes of a request: a photo as a data address, and more
HELD = 4 * LARGEST_CALL  # bytes of requests that are being read
SECONDS_OF_A_BODY = 300  # within which a request has to arrive
VALUES = 2_000  # in a request's JSON, whose objects take far more memory than its text
CONNECTIONS = 400  # open at the same time
LINES_A_MINUTE = 30  # in the log, about refused requests

# Answers
IN_QUEUE = 32  # calls that wait for their turn; further ones are refused
WAITING_AT_ONCE = 16  # calls that are being answered: all but one batch of them wait for the processor
QUICK_AT_ONCE = 2  # passes that explain photos at the same time
BATCH = {"cpu": 1, "cuda": 8}  # photos in a pass: together they gain nothing on a CPU (docs/serving.md)
RENDERING = 2  # documents written at the same time
DECODING = 2  # photos unpacked at the same time, each up to 180 MB
SLOW_AT_ONCE = 2  # slow methods computed at the same time
SLOW_BATCH = 4  # images that a slow method takes in a pass: what a photo waits for, and 0.2 GB each
SLOW_WAITING = 6  # comparisons that wait for one of those places; further ones are refused
PATIENCE = 5.0  # seconds that a slow method's batch lets photos go first, so that it ends some day
TICK = 1.0  # seconds between two looks at whether a comparison's visitor still waits
GRACE = 5.0  # seconds within which a visitor has to listen for the answer

# Memory
REMEMBERED = 50  # visits; those that were used longest ago are forgotten first
SECONDS_OF_A_VISIT = 3600
UNHEARD = 200  # sessions whose answers wait for somebody to listen, each of some MB
