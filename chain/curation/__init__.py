"""`posttrain data curate`: the steps of corpus.curation over a curation's sets, with models, report and manifest."""
