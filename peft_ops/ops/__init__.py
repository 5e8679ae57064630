"""The public operators, one module per stem: launchers, registration, gradient, public function."""
