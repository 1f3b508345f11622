"""What the phases of a run cost, as each of them describes it: its compiled programs and what it
keeps."""
