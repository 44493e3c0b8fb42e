"""The MUSE pipeline made again: annotated pictures → reasoning questions with several masks (paper Sec. 4.1–4.2).

`selection` and `prompts` say what is asked, `drafts`, `filters` and `near_duplicates` what is kept, `ledger` what was
paid, `asking` and `workers` how it runs, `splits` and `assemble` what comes out, `review` how people look it through.
"""
