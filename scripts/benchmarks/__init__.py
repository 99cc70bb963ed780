"""What `scripts/bench` measures: actdump beside the fastest that could be, beside its peers, and beside its own goals."""
