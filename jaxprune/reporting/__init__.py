"""What a run leaves for people and programs: jaxprune.json, the model card, report.html."""
