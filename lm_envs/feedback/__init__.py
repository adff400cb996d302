"""People: studies, the page, agreement and ratings."""
