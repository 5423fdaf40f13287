"""What becomes of verdicts before an update: pairs, their noise and weight, selection, objectives, rewards, rows."""
