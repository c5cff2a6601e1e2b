"""`make gpu-acceptance`: one command that proves on a node with a GPU what needs one."""
