"""The main job: a pruned model larger than its memory cap generates, in several processes."""
