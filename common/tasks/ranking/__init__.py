"""Label ranking: CreditMix, or any label set."""
