"""A whole run: data, model, rounds, evaluation, result; and the folder it lives in."""
