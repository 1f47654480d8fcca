"""What the benches share: clocks and reports, the files of results and what is made of them, models and texts."""
