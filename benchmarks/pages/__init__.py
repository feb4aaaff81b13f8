"""Programs that measure and write pages of docs/, `scripts/page NAME`: NAME.py fills NAME.template.md (`page` says how)."""
