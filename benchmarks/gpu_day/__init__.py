"""Everything that waits for a GPU, measured in one go on a CUDA machine without network: `day.sh`; README.md says how."""
