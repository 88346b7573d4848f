"""Bulk jobs: rows in, exactly one answer or one error line out for each. `docs/batch.md` says how.

One module per step, in the order of a job: `rows` (what travels), `inputs` (files to rows), `shards` (rows to the
Volume's files), `estimate` (what it may take), `jobs` (what was started), `run` (doing it), `outputs` (the Volume's
files to the user's). What runs in the containers is rendered from `templates/batch/`, and imports none of this; but
rows and answers that are in the cloud are read and written there by `cloud`, which travels (`remote_files`).
"""
