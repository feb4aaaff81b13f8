"""What stored numbers mean: schemes, scales, codes and the reference arithmetic."""
