"""Tasks to prompts, to likelihoods or generations, to scores with what is needed to doubt them."""
