"""What an export crops: the request, the budget, and the data that both are judged on."""
