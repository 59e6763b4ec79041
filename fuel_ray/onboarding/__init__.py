"""From a server to a policy for it: the verbs one after the other, in one folder that can be gone on with."""
