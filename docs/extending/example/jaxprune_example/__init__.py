"""A pruning method, a model family and a text source for jaxprune."""
