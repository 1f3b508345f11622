"""What a run costs before it runs: FLOPs, memory and time of its compiled programs."""
