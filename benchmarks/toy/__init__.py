"""Every method where everything is known: a mixture of eight modes in the plane, with an exact teacher."""
