"""The paper's claims at small scale: small towers from scratch, real data, several seeds, rules fixed beforehand."""
