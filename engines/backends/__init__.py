"""One file per runtime that can execute an artifact."""
