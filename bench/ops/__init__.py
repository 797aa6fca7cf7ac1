"""Times the ops: the cases, their peers, the clocks, and the processes that run them."""
