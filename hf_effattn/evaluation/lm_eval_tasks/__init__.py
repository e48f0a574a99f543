"""Tasks for lm_eval: RULER as lm_eval generates it, with scores for short lengths too (see `utils`)."""
