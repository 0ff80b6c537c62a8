"""AdamW and Muon in one optimizer, learning-rate schedules, gradient clipping."""
