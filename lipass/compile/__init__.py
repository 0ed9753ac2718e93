"""Turn one graph of Dynamo into what runs in its place."""
