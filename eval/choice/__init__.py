"""Which method for this model at this length: candidates, screened and compared by measurement."""
