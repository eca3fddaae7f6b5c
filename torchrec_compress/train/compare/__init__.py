"""Many runs side by side, and the report of them."""
