"""TRL's own tests with the classes of this package swapped in, see `docs/drop_in.md`.

```bash
python -m benchmarks.trl_suite path/to/a/checkout/of/trl --work /tmp/trl_suite
```

Nothing is downloaded: the checkout's own scripts make the tiny models and datasets that its tests name, from
tokenizers that are trained here.
"""
