"""transformers' own tests of models, run on ours."""
