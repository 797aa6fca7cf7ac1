"""How the ops are timed: cases, peers, clocks, and the processes that run them."""
