"""Know what is open where the model is called, and keep results between its calls."""
