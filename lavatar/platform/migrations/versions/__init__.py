"""One file a revision, in order. HEAD in lavatar.platform.registry names the last one."""
