"""Who may do what: keys with scopes, and the door that asks for them."""
