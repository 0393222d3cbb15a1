"""Training: conversations to rows, rows to batches, batches to a loss."""
