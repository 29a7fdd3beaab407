"""Curation: operators over batches of records, and the engine that runs them over Parquet files.

| file | operators |
|---|---|
| texts.py | strip_instructions, unify_format, redundancy |
| similar.py | duplicates, decontaminate |
| sampling.py | balance_lengths, latent_classes |
| asking.py | distil_answer, free_response, guided_chain, score, describe |
| difficulty.py | pass_at_k |

An operator is a configuration that can be called (corpus.curation.base). Models are reached only through `Tools`, which
the chain provides, so this package imports neither rewards nor trainers.
"""
