"""The networks of VideoLLaMA 2 in plain PyTorch; nothing in here prints or knows a command line."""
