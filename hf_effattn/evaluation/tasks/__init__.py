"""Tasks, found by name in `TASKS`. A new one is a file and a name in this import."""

from . import (  # noqa: F401
    babilong,
    common_words,
    distractor_qa,
    documents,
    frequent_words,
    json_key_value,
    niah,
    passkey,
    perplexity,
    variable_tracking,
)
